"""The C layouts, as headers for the guests that `ptender build` compiles."""
