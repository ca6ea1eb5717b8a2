"""What a sweep found, in words, tables and plots."""
