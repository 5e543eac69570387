"""What the commands share: arguments, exit statuses, tables."""
