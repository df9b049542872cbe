"""The command line, as the processes that people start."""
