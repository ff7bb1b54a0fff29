import java.io.StringWriter;
import java.sql.*;
import java.util.Properties;
import org.postgresql.PGConnection;

/** PostgreSQL's JDBC driver against a read-only data source of Postern. Ends with "ok". */
public class Client {
  static void check(Object got, Object want, String what) {
    if (!String.valueOf(got).equals(String.valueOf(want))) {
      System.err.println(what + ": got " + got + ", want " + want);
      System.exit(1);
    }
  }

  interface Action {
    void run() throws SQLException;
  }

  static void refused(String state, String what, Action action) {
    try {
      action.run();
    } catch (SQLException e) {
      check(e.getSQLState(), state, what + " (" + e.getMessage() + ")");
      return;
    }
    check("no error", state, what);
  }

  static Connection connect(String more) throws SQLException {
    Properties p = new Properties();
    p.setProperty("user", System.getenv("PGUSER"));
    p.setProperty("password", System.getenv("PGPASSWORD"));
    return DriverManager.getConnection(
        "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE").replace("/", "%2F")
            + "?sslmode=verify-full&sslrootcert=" + System.getenv("PGSSLROOTCERT") + more, p);
  }

  static void exercise(String more) throws Exception {
    try (Connection c = connect(more)) {
      try (PreparedStatement s = c.prepareStatement("select name, id from customers where id = ?")) {
        for (int i = 0; i < 12; i++) { // a named statement from the fifth on
          s.setInt(1, i % 3 + 1);
          try (ResultSet r = s.executeQuery()) {
            check(r.next() && r.getString(1).equals("customer " + (i % 3 + 1)), true, "a prepared statement");
          }
        }
      }
      try (Statement s = c.createStatement();
          ResultSet r = s.executeQuery("select 1::int8, 2.50::numeric, true, timestamptz '2026-11-22 01:02:03+00', array['a','b'], null::text, '\\x00ff'::bytea, '{\"k\":1}'::jsonb")) {
        r.next();
        check(r.getLong(1) + " " + r.getBigDecimal(2) + " " + r.getBoolean(3) + " " + r.getTimestamp(4).getTime() + " " + r.getArray(5) + " " + r.getString(6) + " " + r.getBytes(7).length + " " + r.getString(8),
            "1 2.50 true 1795309323000 {a,b} null 2 {\"k\": 1}", "a row of types");
      }
      c.setAutoCommit(false);
      try (Statement s = c.createStatement()) {
        s.setFetchSize(100); // a portal, 100 rows at a time
        int n = 0;
        try (ResultSet r = s.executeQuery("select * from orders")) {
          while (r.next()) n++;
        }
        check(n, 5000, "rows by fetch size");
      }
      refused("25006", "a write in a transaction", () -> { try (Statement s = c.createStatement()) { s.executeUpdate("update orders set amount = 0"); } });
      refused("25P02", "a statement in a failed transaction", () -> { try (Statement s = c.createStatement()) { s.executeQuery("select 1"); } });
      c.rollback();
      c.setAutoCommit(true);
      refused("25006", "a write", () -> { try (Statement s = c.createStatement()) { s.executeUpdate("insert into orders values (1)"); } });
      DatabaseMetaData m = c.getMetaData();
      int tables = 0, columns = 0, keys = 0;
      try (ResultSet r = m.getTables(null, "public", "%", new String[] {"TABLE", "VIEW"})) { while (r.next()) tables++; }
      try (ResultSet r = m.getColumns(null, "public", "orders", "%")) { while (r.next()) columns++; }
      try (ResultSet r = m.getPrimaryKeys(null, "public", "orders")) { while (r.next()) keys++; }
      check(tables + " " + columns + " " + keys, "3 5 1", "metadata");
      StringWriter out = new StringWriter();
      check(c.unwrap(PGConnection.class).getCopyAPI().copyOut("copy (select id from customers order by id) to stdout", out), 100, "copy");
      try (Statement s = c.createStatement()) {
        s.setQueryTimeout(1); // a cancel request
        refused("57014", "a statement with a timeout", () -> s.execute("select pg_sleep(60)"));
      }
      check(c.isValid(5), true, "the connection afterwards");
    }
  }

  public static void main(String[] args) throws Exception {
    exercise("");
    exercise("&preferQueryMode=simple");
    exercise("&binaryTransfer=true&prepareThreshold=1&ApplicationName=client");
    System.out.println("ok");
  }
}
