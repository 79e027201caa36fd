"""From any image a user has to what the vision encoder reads; damage and limits come first."""
