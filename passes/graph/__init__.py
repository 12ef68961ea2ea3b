"""The graph: traced programs, facts about their nodes, and ways to add nodes."""
