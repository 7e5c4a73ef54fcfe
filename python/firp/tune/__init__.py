"""`firp tune`: which draft tree decodes fastest on the machine at hand."""
