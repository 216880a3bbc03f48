"""Ray itself: a cluster found or made, its token, the code that is shipped to it, jobs on it, what it leaves behind."""
