"""Reading the texts that adapters are trained and measured on."""
