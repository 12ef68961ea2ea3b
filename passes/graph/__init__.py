"""A traced graph, what is known of its nodes, and how nodes are added."""
