"""The command line: argument parsing and printing only; each command is a thin call into a stage."""
