"""What is saved for backward."""
