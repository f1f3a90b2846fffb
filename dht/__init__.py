"""Who is there and what they hold."""
