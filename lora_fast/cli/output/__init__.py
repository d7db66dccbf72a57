"""What a command shows and leaves: terminal, tables, plots, run folders."""
