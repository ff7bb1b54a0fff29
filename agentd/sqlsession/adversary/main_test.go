package adversary

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/leakwait"
)

// parser is shared by the tests: it takes a second to start, more with the race
// detector.
var parser *sqlsession.Parser

// TestMain serves as the processes of SQL sessions and of the parser, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case sqlsession.ChildArg:
			os.Exit(sqlsession.ChildMain())
		case sqlsession.ParserArg:
			os.Exit(sqlsession.ParserMain())
		}
	}
	parser = sqlsession.NewParser(sqlsession.ParserConfig{})
	parser.Start()
	code := m.Run()
	parser.Close()
	if err := stopWorlds(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		leakwait.Wait()
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
