"""Which group, and when: the choice (`selector`), the schedule (`schedule`) and the record (`history`)."""
