"""What several test modules share: servers, tiny models, image files and short runs."""
