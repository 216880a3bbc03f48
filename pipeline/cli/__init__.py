"""The command line: flags, tables, exit codes."""
