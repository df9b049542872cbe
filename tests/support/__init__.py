"""What several test modules share: real servers and ways to wait."""
