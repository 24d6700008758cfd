"""The product of one row: programs that stream weight rows through shared memory."""
