"""What a tender gives away before its guest runs."""
