"""x W^T for 9 to 256 rows of x on Hopper: a warp copies ahead, warpgroups unpack and multiply."""
