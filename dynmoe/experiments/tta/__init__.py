"""`python -m dynmoe.tta`: methods on streams of shifted images."""
