"""``from_pretrained``: open and check the files of a checkpoint once, then load what was checked."""
