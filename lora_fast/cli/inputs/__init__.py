"""What a command is given: settings, methods, models, data."""
