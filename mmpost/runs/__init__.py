"""What a run leaves behind: its folder, its live line on the terminal, its report. No torch here."""
