package sqltext

import "iter"

// Kind is what a Token is.
type Kind = kind

// The kinds of tokens that callers outside tell apart.
const (
	Space    = space    // white space and comments
	Word     = word     // an identifier or keyword without quotes
	Quoted   = quoted   // "an identifier" or U&"one", with its quotes
	Literal  = literal  // a string in any of its forms
	Number   = number   // 1, 1.5e3, 0x1f
	Native   = native   // $1
	Symbol   = symbol   // one character of anything else; "::" and ":=" are one
	Brace    = brace    // {{name}}, {{name|form}}
	Variable = variable // :name
)

// Token is a piece of a text.
type Token struct {
	Kind Kind
	Text string
	// Start is the offset of its first byte.
	Start int
}

// Tokens cuts a text into tokens, which join to the text. It never fails: what is
// not closed reaches to the end.
func Tokens(text string) iter.Seq[Token] {
	return func(yield func(Token) bool) {
		scan := scanner{text: text}
		for {
			start := scan.at
			t, ok := scan.next()
			if !ok || !yield(Token{t.kind, t.text, start}) {
				return
			}
		}
	}
}

// Verbatim is a statement whose text goes to the server as it is, without values.
func Verbatim(text string) *Statement { return &Statement{Text: text, original: text} }
