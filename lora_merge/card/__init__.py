"""Model cards: what people see of an adapter on the Hub, made of facts and never of a stranger's markup."""
