"""What is learned: the vectors, where they start, the forms they are trained in. Imports torch and nothing of the base."""
