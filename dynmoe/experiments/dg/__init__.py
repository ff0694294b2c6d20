"""`python -m dynmoe.dg`: methods with each domain left out in turn."""
