"""What the commands print and write: the terminal, tables, plots, HTML pages and run folders."""
