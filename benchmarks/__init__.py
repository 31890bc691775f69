"""What README's performance tables are made with."""
