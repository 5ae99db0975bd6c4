"""Properties, queries, domains, the planner and mixing: pure functions of numpy arrays, without I/O, MPI or a clock."""
