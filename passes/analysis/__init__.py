"""Analysis: facts about a graph before it is rewritten."""
