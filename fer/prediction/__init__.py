"""From photographs and videos to named expressions on disk and in a browser."""
