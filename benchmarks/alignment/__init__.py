"""What each part of RAD-DPO does on real purchases."""
