"""Apply a decision everywhere: pure plans (`plan`), in-place removal (`retire`), shrinking (`compact`), checks
(`verify`), and the one who orders them (`coordinator`)."""
