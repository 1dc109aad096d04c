"""What a row says, what a policy did, who owns which random stream, and what went wrong. No torch here."""
