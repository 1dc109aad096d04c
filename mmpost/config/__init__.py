"""Every option, where its value came from, and what is wrong with it. No torch here."""
