"""Where the run happens: the device (`device`) and the process groups (`mesh`). Passed in everywhere, never global."""
