"""Environments: Minecraft-like worlds and robots. Nothing has landed here yet."""
