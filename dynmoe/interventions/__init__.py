"""What keeps any network plastic: continual backprop, ReDo, shrink-and-perturb and others."""
