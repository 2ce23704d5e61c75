"""The C runtime of guests, which `tender.image.build` compiles with a guest's sources."""
