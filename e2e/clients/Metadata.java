import java.sql.*;
import java.util.*;

/**
 * What the JDBC driver's DatabaseMetaData tells of a database, as lines of text: of the server
 * that PGHOST and so on name (with TLS if PGSSLROOTCERT is set). Methods that fail are lines
 * with the SQLSTATE and the message. Ends with "ok".
 */
public class Metadata {
  interface Question {
    ResultSet ask() throws SQLException;
  }

  static Connection connect(String more) throws SQLException {
    Properties p = new Properties();
    p.setProperty("user", System.getenv("PGUSER"));
    if (System.getenv("PGPASSWORD") != null) p.setProperty("password", System.getenv("PGPASSWORD"));
    String ca = System.getenv("PGSSLROOTCERT");
    return DriverManager.getConnection(
        "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE").replace("/", "%2F")
            + "?" + (ca == null ? "sslmode=disable" : "sslmode=verify-full&sslrootcert=" + ca) + more, p);
  }

  static void tell(String name, Question q) {
    List<String> lines = new ArrayList<>();
    try (ResultSet r = q.ask()) {
      ResultSetMetaData m = r.getMetaData();
      while (r.next()) {
        StringBuilder line = new StringBuilder();
        for (int i = 1; i <= m.getColumnCount(); i++) line.append(" ").append(m.getColumnName(i)).append("=").append(String.valueOf(r.getString(i)).replace("\n", "\\n"));
        lines.add(line.toString());
      }
    } catch (SQLException e) {
      System.out.println(name + ": ERROR " + e.getSQLState() + " " + e.getMessage().replace("\n", " "));
      return;
    }
    System.out.println(name + ": " + lines.size() + " rows");
    for (String line : lines) System.out.println(name + ":" + line);
  }

  static void exercise(String more) throws Exception {
    try (Connection c = connect(more)) {
      DatabaseMetaData d = c.getMetaData();
      String s = "public";
      try {
        System.out.println("product: " + d.getDatabaseProductName() + " " + d.getDatabaseMajorVersion() + " " + d.getMaxColumnNameLength() + " " + d.getMaxColumnsInIndex() + " " + d.getSQLKeywords().length() + " " + d.getNumericFunctions().length());
      } catch (SQLException e) {
        System.out.println("product: ERROR " + e.getSQLState() + " " + e.getMessage().replace("\n", " "));
      }
      tell("getSchemas", () -> d.getSchemas());
      tell("getSchemas(null, %)", () -> d.getSchemas(null, "pub%"));
      tell("getTableTypes", () -> d.getTableTypes());
      tell("getTables", () -> d.getTables(null, s, "%", null));
      tell("getTables(TABLE, VIEW)", () -> d.getTables(null, s, "%", new String[] {"TABLE", "VIEW", "PARTITIONED TABLE", "SEQUENCE", "INDEX", "TYPE"}));
      tell("getTables(system)", () -> d.getTables(null, "pg_catalog", "pg_am", null));
      tell("getColumns", () -> d.getColumns(null, s, "%", "%"));
      tell("getColumns(one)", () -> d.getColumns(null, null, "customers", null));
      tell("getPrimaryKeys", () -> d.getPrimaryKeys(null, s, "orders"));
      tell("getPrimaryKeys(defaults)", () -> d.getPrimaryKeys(null, s, "defaults"));
      tell("getIndexInfo", () -> d.getIndexInfo(null, s, "customers", false, true));
      tell("getIndexInfo(unique)", () -> d.getIndexInfo(null, s, "orders", true, false));
      tell("getIndexInfo(defaults)", () -> d.getIndexInfo(null, s, "defaults", false, false));
      tell("getImportedKeys", () -> d.getImportedKeys(null, s, "orders"));
      tell("getExportedKeys", () -> d.getExportedKeys(null, s, "customers"));
      tell("getCrossReference", () -> d.getCrossReference(null, s, "customers", null, s, "orders"));
      tell("getFunctions", () -> d.getFunctions(null, s, "%"));
      tell("getFunctionColumns", () -> d.getFunctionColumns(null, s, "%", "%"));
      tell("getProcedures", () -> d.getProcedures(null, s, "%"));
      tell("getProcedureColumns", () -> d.getProcedureColumns(null, s, "%", "%"));
      tell("getTypeInfo", () -> d.getTypeInfo());
      tell("getUDTs", () -> d.getUDTs(null, s, "%", null));
      tell("getTablePrivileges", () -> d.getTablePrivileges(null, s, "customers"));
      tell("getColumnPrivileges", () -> d.getColumnPrivileges(null, s, "customers", "%"));
      tell("getBestRowIdentifier", () -> d.getBestRowIdentifier(null, s, "orders", DatabaseMetaData.bestRowSession, false));
      tell("getVersionColumns", () -> d.getVersionColumns(null, s, "orders"));
      tell("getCatalogs", () -> d.getCatalogs());
      tell("getClientInfoProperties", () -> d.getClientInfoProperties());
      // What a tool learns of a query before it runs it.
      try (PreparedStatement p = c.prepareStatement("select o.id, o.amount, o.kind, c.name as buyer, count(*) over () from orders o join customers c on c.id = o.customer where o.at > ? and o.amount < ?")) {
        ResultSetMetaData m = p.getMetaData();
        for (int i = 1; i <= m.getColumnCount(); i++)
          System.out.println("prepared: " + m.getColumnLabel(i) + " " + m.getColumnTypeName(i) + " " + m.getColumnType(i) + " " + m.getPrecision(i) + " " + m.getScale(i) + " " + m.isNullable(i) + " " + m.getTableName(i) + " " + m.getSchemaName(i) + " " + m.isAutoIncrement(i));
        ParameterMetaData pm = p.getParameterMetaData();
        for (int i = 1; i <= pm.getParameterCount(); i++) System.out.println("parameter: " + pm.getParameterTypeName(i) + " " + pm.getParameterType(i));
      } catch (SQLException e) {
        System.out.println("prepared: ERROR " + e.getSQLState() + " " + e.getMessage());
      }
      System.out.println("schema: " + c.getSchema() + " valid " + c.isValid(5) + " read-only " + c.isReadOnly() + " isolation " + c.getTransactionIsolation());
    }
  }

  public static void main(String[] args) throws Exception {
    for (String more : new String[] {"", "&preferQueryMode=simple", "&prepareThreshold=1&binaryTransfer=true"}) {
      System.out.println("--- " + more);
      exercise(more);
    }
    System.out.println("ok");
  }
}
