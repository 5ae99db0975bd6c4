"""What is measured beside losses: scalars of the user's, and how many held-out sequences a validation takes."""
