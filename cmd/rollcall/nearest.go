package main

// nearest returns the name that is meant by one that nobody knows: of those within a
// third of its length the nearest, else "".
func nearest(name string, known []string) string {
	best, found := max(1, len(name)/3)+1, ""
	for _, k := range known {
		if d := distance(name, k); d < best || d == best && found != "" && k < found {
			best, found = d, k
		}
	}
	return found
}

// distance is how many bytes must be put in, taken out, changed or swapped with the next
// to make b of a (optimal string alignment).
func distance(a, b string) int {
	var before []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next := make([]int, len(b)+1)
		next[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next[j+1] = min(row[j+1]+1, next[j]+1, row[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
