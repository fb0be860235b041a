"""Planning a student for a machine: shapes, what they need, what training them takes, and the recipe."""
