"""Shows and saves the results of the commands: terminal, tables, plots, HTML pages and run folders."""
