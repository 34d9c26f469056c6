"""What a run learnt, on the disk: files, manifest, saving that commits or leaves nothing, loading at any size."""
