"""What a pool's server is made of: sessions, the verbs by what they are about, and the bytes that move."""
