"""Which rows need their sound, picture or video: accuracy with the medium, and with it replaced by nothing."""
