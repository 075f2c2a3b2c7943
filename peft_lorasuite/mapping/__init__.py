"""How an upgrade map is built, for whom, and what methods keep in it; `upgrade_map` is the room that uses them."""
