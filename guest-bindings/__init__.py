"""The C runtime of guests, as data: `tender.build` compiles it together with a guest's sources."""
