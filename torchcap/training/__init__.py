"""Learning: the teacher beside the student, and the losses between them."""
