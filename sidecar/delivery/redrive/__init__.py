"""
What becomes of dead letters: looking at them, publishing them again, giving them up.

A dead letter is an event at a broker; what was done to it is in *marks*, events on a topic of
their own at the same broker, which all sidecars read in one order and so agree.
"""
